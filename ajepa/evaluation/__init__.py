"""Evaluation of encoders: frozen features, probes, the fine-tuned classifier and plots."""
