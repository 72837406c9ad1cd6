"""Cross entropy from hidden states over a vocabulary split among ranks; whole logits are never held."""
