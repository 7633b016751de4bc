"""Fine-tune on a tether: every layer's weights stay inside a ball around the pre-trained weights."""
