"""Log-mel patches, masks, encoders and predictor."""
