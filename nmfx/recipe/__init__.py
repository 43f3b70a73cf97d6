"""A YAML file that describes a whole run, read strictly, and the stages it drives."""
