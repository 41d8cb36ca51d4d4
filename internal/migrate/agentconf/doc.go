// Package agentconf reads a SPIRE Agent's configuration and writes the
// sds-agent's that does the same.
//
// It promises an account of every key in the file: what it became, why it is
// not needed, or what to do because it cannot be had; a key it does not know is
// named with its line. What it writes has been read by the sds-agent's own
// parser. Threats: files are large, nested or broken on purpose, so size and
// depth are bounded; and they hold secrets, so values appear in the result only
// where they are keys of the sds-agent that are no secrets.
package agentconf
