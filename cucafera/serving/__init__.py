"""A model for other people and programs: OpenAI's API, a web page and a Telegram bot."""
