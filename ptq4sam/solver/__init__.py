"""The published command line, and the configuration files it reads."""
