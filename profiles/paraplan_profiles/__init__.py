"""Profiles of devices and clusters, as data files; see profiles/README.md."""
