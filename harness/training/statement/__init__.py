"""What a checkpoint's statement says: `record` has its facts, `facts` those that a whole launch shares."""
