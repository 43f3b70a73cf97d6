"""Sensitivities, one file a table: what each pattern of each site loses. `nmfx.settings.methods` names them."""
