"""``rnnkern flow``: training runs that show how far back a net learns, on a text or on tasks that ask for memory."""
