"""Audio files: which bytes hold a whole recording, and its samples."""
