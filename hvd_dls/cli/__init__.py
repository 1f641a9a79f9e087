"""The command ``hvd-dls``: what can be asked outside of a training."""
