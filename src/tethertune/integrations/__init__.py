"""Callbacks for trainers that own the loop: Hugging Face's Trainer (and TRL's), and Lightning.

Loops that are one's own need none of this: attach the constraint to the optimiser, in plain PyTorch, Accelerate,
Fabric and timm alike.
"""
