"""Lists the files of a data set: folders, manifests, tars, and segments of their files."""
