"""Our glue to transformers: the attention function, the prefix cache, a model with its cache, loading."""
