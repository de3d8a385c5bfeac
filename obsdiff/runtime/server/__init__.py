"""An HTTP server for bundles: the OpenAI images API in one process, one worker process a bundle that draws."""
