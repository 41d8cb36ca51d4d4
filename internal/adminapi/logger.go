package adminapi

import (
	"context"
	"log/slog"

	"github.com/spiffe-node/spiffe-node/internal/spirewire/loggerpb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/typespb"
)

// loggerService is spire.api.server.logger.v1.Logger over a slog level.
type loggerService struct {
	loggerpb.UnimplementedLoggerServer
	level  *slog.LevelVar
	launch slog.Level
}

// levels pairs the wire's levels with slog's, which has no names for the outer
// ones; from quiet to talkative.
var levels = []struct {
	wire typespb.LogLevel
	slog slog.Level
}{
	{typespb.LogLevel_PANIC, slog.LevelError + 8},
	{typespb.LogLevel_FATAL, slog.LevelError + 4},
	{typespb.LogLevel_ERROR, slog.LevelError},
	{typespb.LogLevel_WARN, slog.LevelWarn},
	{typespb.LogLevel_INFO, slog.LevelInfo},
	{typespb.LogLevel_DEBUG, slog.LevelDebug},
	{typespb.LogLevel_TRACE, slog.LevelDebug - 4},
}

// levelToWire is the level whose records are the most talkative that pass.
func levelToWire(l slog.Level) typespb.LogLevel {
	for _, pair := range levels {
		if l >= pair.slog {
			return pair.wire
		}
	}
	return typespb.LogLevel_TRACE
}

func (s *loggerService) state() *typespb.Logger {
	return &typespb.Logger{CurrentLevel: levelToWire(s.level.Level()), LaunchLevel: levelToWire(s.launch)}
}

func (s *loggerService) GetLogger(context.Context, *loggerpb.GetLoggerRequest) (*typespb.Logger, error) {
	return s.state(), nil
}

func (s *loggerService) SetLogLevel(ctx context.Context, req *loggerpb.SetLogLevelRequest) (*typespb.Logger, error) {
	if req.GetNewLevel() == typespb.LogLevel_UNSPECIFIED {
		return nil, invalid("newLevel value cannot be LogLevel_UNSPECIFIED", nil)
	}
	for _, pair := range levels {
		if pair.wire == req.GetNewLevel() {
			// Before the change, which may silence the record of it if the
			// record goes to the log.
			audit(ctx, "set log level", nil, slog.String("level", pair.wire.String()))
			s.level.Set(pair.slog)
			return s.state(), nil
		}
	}
	return nil, invalid("unsupported log level", nil)
}

func (s *loggerService) ResetLogLevel(ctx context.Context, _ *loggerpb.ResetLogLevelRequest) (*typespb.Logger, error) {
	s.level.Set(s.launch)
	audit(ctx, "reset log level", nil, slog.String("level", levelToWire(s.launch).String()))
	return s.state(), nil
}
