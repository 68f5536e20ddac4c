"""A language model: hooks, tokens, text, one reader, loading, one scorer, one writer of replies. Nothing is imported here."""
