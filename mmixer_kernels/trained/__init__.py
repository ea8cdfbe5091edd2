"""The uses of a trained network: evaluation, predictions, features, export."""
