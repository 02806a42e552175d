"""What frozen features are worth: features, probes, classifier, plots."""
