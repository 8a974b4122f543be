"""Configuration: pydantic models, YAML files with overrides, search spaces."""
