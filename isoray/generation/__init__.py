"""Generation from the contrast of models: one operator (`contrast`), one engine per file, batches of prompts on Ray."""
