"""Audio file formats: finds the bytes that hold a whole recording, and reads its samples."""
