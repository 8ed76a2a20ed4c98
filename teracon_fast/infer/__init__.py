"""A trained run at work: representations, recommendations and label probabilities of users."""
