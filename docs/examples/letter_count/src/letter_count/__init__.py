import gymnasium

gymnasium.register(id="LetterCount-v0", entry_point="letter_count.env:LetterCountEnv")
