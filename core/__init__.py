"""The science and the files: torch only, except the four rooms whose names say which host they serve."""
