"""What a transformer is: its family, its layers, and how to take layers out. Knows no pruning method."""
