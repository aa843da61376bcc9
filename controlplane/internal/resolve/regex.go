package resolve

import (
	"errors"
	"fmt"
	"regexp/syntax"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/weftmesh/weft/controlplane/internal/ir"
)

const (
	// regexLimit bounds an expression's length in characters.
	regexLimit = 256
	// regexSize bounds what an expression compiles to, in instructions of RE2. Envoys take 65,536 (package lds); the
	// estimate of regexSizeOf is never below what RE2 makes, and many routes share a node's memory.
	regexSize = 1 << 15
)

// checkRegex refuses what Envoy's RE2 would: one expression that it cannot take makes Envoy refuse all that it stands in.
// Go's syntax package reads the same language, of text; Envoy's RE2 reads bytes (Latin-1), so expressions are ASCII alone.
func checkRegex(kind ir.MatchKind, value string) error {
	if kind != ir.Regex {
		return nil
	}
	if n := utf8.RuneCountInString(value); n > regexLimit {
		return fmt.Errorf("regular expression of %d characters: at most %d", n, regexLimit)
	}
	parsed, err := syntax.Parse(value, syntax.Perl)
	if err == nil {
		err = checkASCII(value)
	}
	if err != nil {
		return fmt.Errorf("regular expression %q cannot be compiled: %w", value, err)
	}
	if regexSizeOf(parsed.Simplify(), regexSize) > regexSize {
		return fmt.Errorf("regular expression %q compiles to more than %d instructions: repeat less, or smaller classes", value, regexSize)
	}
	return nil
}

// checkASCII refuses what means one thing in text and another in bytes, or nothing there, in an expression that Go can parse.
func checkASCII(value string) error {
	if strings.ContainsFunc(value, func(r rune) bool { return r > unicode.MaxASCII }) {
		return errors.New("it compares bytes: use ASCII alone, percent-encoded in paths")
	}
	for {
		_, rest, found := strings.Cut(value, `\`)
		if !found || rest == "" {
			return nil
		}
		value = rest[1:]
		code := ""
		switch escape := rest[0]; {
		case escape == 'Q':
			_, value, _ = strings.Cut(value, `\E`)
		case escape == 'p' || escape == 'P':
			return fmt.Errorf(`it compares bytes: \%c has no meaning there, use classes of ASCII characters`, escape)
		case escape == 'x' && strings.HasPrefix(value, "{"):
			code, _, _ = strings.Cut("0x"+value[1:], "}")
		case escape == 'x':
			code = "0x" + value[:min(2, len(value))]
		case '0' <= escape && escape <= '7':
			digits := rest[:min(3, len(rest))]
			code = "0" + digits[:len(digits)-len(strings.TrimLeft(digits, "01234567"))]
		}
		if code == "" {
			continue
		}
		if n, err := strconv.ParseUint(code, 0, 32); err != nil || n > unicode.MaxASCII {
			return fmt.Errorf("it compares bytes: the character %s is not ASCII", code)
		}
	}
}

// regexSizeOf estimates the instructions of a simplified expression from above, and stops counting beyond a limit. It holds
// also for an RE2 that reads UTF-8: a rune costs the bytes of its encoding, a range every sequence of byte ranges it needs.
func regexSizeOf(re *syntax.Regexp, limit int) int {
	size := 2
	switch re.Op {
	case syntax.OpLiteral:
		size += utf8.UTFMax * len(re.Rune)
	case syntax.OpCharClass:
		for i := 0; i+1 < len(re.Rune); i += 2 {
			size += rangeSize(re.Rune[i], re.Rune[i+1])
		}
	case syntax.OpAnyChar, syntax.OpAnyCharNotNL:
		size += rangeSize(0, utf8.MaxRune) + utf8.UTFMax // without the newline
	}
	for _, sub := range re.Sub {
		if size > limit {
			break
		}
		size += 2 + regexSizeOf(sub, limit)
	}
	return size
}

// rangeSize splits a range of runes into sequences of byte ranges, as RE2 does; each costs its bytes and a branch. RE2
// shares what sequences have in common.
func rangeSize(low, high rune) int {
	for _, last := range []rune{0x7f, 0x7ff, 0xffff} { // the longest of each length of encoding
		if low <= last && high > last {
			return rangeSize(low, last) + rangeSize(last+1, high)
		}
	}
	length := utf8.RuneLen(high)
	for i := 1; i < length; i++ {
		tail := rune(1)<<(6*i) - 1
		if low&^tail == high&^tail {
			continue
		}
		if low&tail != 0 {
			return rangeSize(low, low|tail) + rangeSize((low|tail)+1, high)
		}
		if high&tail != tail {
			return rangeSize(low, high&^tail-1) + rangeSize(high&^tail, high)
		}
	}
	return length + 1
}
