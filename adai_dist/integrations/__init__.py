"""Integrations with other training libraries, each activated when that library is imported."""
