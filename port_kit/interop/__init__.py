"""Weight mappings of other libraries, to rules and back: vLLM, transformers and SGLang."""
