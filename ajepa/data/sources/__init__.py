"""What a data set lists: folders, manifests, tars, and segments of their files."""
