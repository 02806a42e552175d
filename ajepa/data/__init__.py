"""From sources to batches of PCM: what a data set lists, how a file is judged and decoded, how clips are cut."""
