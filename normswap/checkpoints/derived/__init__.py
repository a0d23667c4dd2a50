"""Files that are made from converted files: baked, and reverted."""
