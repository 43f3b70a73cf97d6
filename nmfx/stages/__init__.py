"""The steps of a job, each written once: settings in, a record out; a command and a recipe are its callers."""
