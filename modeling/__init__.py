"""The files that travel inside every converted checkpoint; they import torch and transformers only."""
