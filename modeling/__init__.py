"""The files that every converted checkpoint carries; they import torch and transformers only."""
