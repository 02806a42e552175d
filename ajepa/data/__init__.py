"""Turns a source into batches of PCM: lists the files, checks and decodes them, and cuts clips from the recordings."""
