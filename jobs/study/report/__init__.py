"""What a study leaves behind for people: a page, plots and tables, made of an answer and the outcomes alone."""
