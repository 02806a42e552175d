"""Small parts that know nothing of audio or models: random numbers, files, signals, run folders."""
