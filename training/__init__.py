"""What only training needs: the small world, its documents, the judge, saving and resuming."""
