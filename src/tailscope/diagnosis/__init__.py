"""Diagnosis of features that the user already has: where accuracy is lost, for which classes, and what may help."""
