"""What the formats for low memory cost in precision."""
