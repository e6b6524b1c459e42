"""What is learned, and how it travels: files, the Hub, other programs' formats. Knows no pipeline."""
