"""The Keras contract: every optimizer against every feature of Keras."""
