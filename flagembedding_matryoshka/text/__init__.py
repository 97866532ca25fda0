"""From texts to ids, and the collections they come from."""
