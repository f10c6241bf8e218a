"""The methods that KDP is compared with, one file each."""
