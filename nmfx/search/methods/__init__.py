"""Search methods, one file each; `nmfx.settings.methods` names them and says what each needs."""
