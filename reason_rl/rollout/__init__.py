"""Sample and grade: problems in, scored groups out."""
