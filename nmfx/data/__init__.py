"""Labelled pictures for training, search and evaluation, on timm's data sets, transforms and mixup."""
