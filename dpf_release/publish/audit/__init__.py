"""`audit`: every artefact of a release and of its vault, and every check of the release as it is now."""
