"""What looks at people's material before models do: faces, and speech in a mix."""
