"""One training loop for all: dense networks, healing, models; its batches, losses, tasks and guards."""
