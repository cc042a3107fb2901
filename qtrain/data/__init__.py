"""Text to batches: sources, tokenizers, prepared corpora and the order in which a run reads them.

Nothing is imported here: settings of sources are read where neither torch nor numpy is wanted.
"""
