"""Images: where they come from (sources), how they become tensors (transforms), and how they are cached (images)."""
